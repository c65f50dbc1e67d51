"""Print every flag of main.py as the page docs/flags.md: python -m util.config > docs/flags.md"""

from __future__ import annotations

from util.config.checks import plain_text
from util.config.fields import FLAGS, GROUPS
from util.config.flag import ROLES, Flag

_TOP = """\
# Flags

Every flag of `main.py`, printed by `python -m util.config`. All flags can be written with dashes too
(`--batch-size`). Free on resume: the flag changes nothing that is learned. If another flag differs
from the checkpoint's, a warning names both values, and the new value is used.

| role | meaning |
|---|---|"""
_COLUMNS = """\
| flag | default | values | role | free on resume | meaning |
|---|---|---|---|---|---|"""


def main() -> None:
    print(_TOP)
    for role, meaning in ROLES.items():
        print(f"| {role} | {meaning} |")
    for group, config in GROUPS.items():
        print(f"\n## {config.__doc__}\n\n{_COLUMNS}")
        for flag in FLAGS.values():
            if flag.group == group:
                print(_row(flag))


def _row(flag: Flag) -> str:
    # ranges are for numbers, choices for names
    default, values = plain_text(flag.default) or "none", ""
    if isinstance(flag.default, bool):
        default, values = "off", "switch"
    elif flag.choices:
        values = plain_text(flag.choices)
    elif flag.parse is not str:
        values = flag.range

    # --help does not list these, so the page says why
    meaning = flag.help
    if flag.refused:
        meaning += f" ({flag.refused})"
    free = "yes" if flag.free_on_resume else "no"
    return f"| `--{flag.name}` | {default} | {values} | {flag.of} | {free} | {meaning} |"


if __name__ == "__main__":
    main()
