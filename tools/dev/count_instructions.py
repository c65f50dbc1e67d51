"""Counts the instructions of the kernels of published.cuh in a library's machine code for sm_90.

    cd models/ops && FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 sh ./make.sh && cd ../..
    python tools/dev/count_instructions.py models/ops/_cuda.so

Needs cuobjdump and c++filt on PATH. Counted is a warp whose samples all lie inside the map: the longest way
through the code without the shuffles that hand on single samples.
"""

from __future__ import annotations

import re
import subprocess
import sys

ROWS = 22_223 * 8  # of the encoder at 800 x 1333, one image
LANES = {"float": 8, "double": 16, "c10::BFloat16": 4, "c10::Half": 4}  # of a row


def main(library: str) -> None:
    code = output("cuobjdump", "-sass", "-arch", "sm_90", library)
    for function in code.split("Function : ")[1:]:
        name = output("c++filt", function.split()[0]).replace("deformable::", "").split("(")[0]
        found = re.match(r"void published_(?:forward|backward)_kernel<([\w:]+),", name)
        if not found:
            continue
        # a loop over a row's samples, and in the backward one over pairs of them within
        lanes = LANES[found[1]]
        count = longest_way(function, [turns for turns in (16 // lanes, lanes // 2) if turns > 1])
        millions = count * ROWS * lanes / 32 / 1e6
        print(f"{count:5d} a warp, {millions:5.1f} million in the encoder: {name.removeprefix('void ')}")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def longest_way(function: str, turns: list[int]) -> int:
    """Instructions issued until the end; those within n loops count as often as turns[:n] say."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?(U?P\w+) +)?(?:@!?U?P\w+ +)?([\w.]+)(.*?);", function)
    at = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    jumps = {i: at[int(line[3].split("0x")[-1], 16)] for i, line in enumerate(lines) if line[2] == "BRA"}
    passes = [i for i, line in enumerate(lines) if line[2] == "SHFL.IDX"]
    loops = [
        range(to, i + 1)
        for i, to in jumps.items()
        # the last jump leads to itself, and other samples have a loop of their own in the forward
        if to < i and any(lines[k][2].startswith("LDS") for k in range(to, i))
    ]

    longest: list[float] = [0.0] * (len(lines) + 1)
    for i in reversed(range(len(lines))):
        _, condition, name, _ = lines[i]
        after = longest[i + 1]
        if name == "BRA" and jumps[i] > i:
            after = max(after, longest[jumps[i]]) if condition else longest[jumps[i]]
        if name == "EXIT" and not condition:
            after = 0
        weight = 1
        for depth in range(sum(i in loop for loop in loops)):
            weight *= turns[depth]
        longest[i] = float("-inf") if i in passes else after + weight * (name != "NOP")
    return int(longest[0])


if __name__ == "__main__":
    main(sys.argv[1])
