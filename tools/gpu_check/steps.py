"""The steps of the check: their commands, how long they may take, the figures in their output, and
what was expected.

What is expected holds for an H100 and is counted, not measured (docs/ops.md, docs/gpu.md). Without
a GPU the same steps run at small sizes, to try the commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# seconds that the checks, which run side by side, usually take
CHECKS_TAKE = 150


@dataclass(frozen=True)
class Step:
    """A command, with {data}, {work} and {logs} for folders; the logs go into the results.

    usual, limit: seconds; it is left out if less than `usual` are left, and ended after `limit`.
    figures: names, and patterns whose group is the figure in the output.
    modules: what Python must have. after: the step whose files it reads.
    """

    name: str
    usual: int
    limit: int
    command: str
    figures: Mapping[str, str] = field(default_factory=dict)
    expected: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_gpu: bool = False
    modules: tuple[str, ...] = ()
    after: str = ""


DETECTOR = ("scipy", "tqdm")
TRAINING = (*DETECTOR, "pycocotools", "safetensors")
DATA = "--train_images 16 --val_images 8"  # enough to stop in the middle of an epoch
BATCHFORMER = "--bf 1 --share_bf 0 --insert_idx 0"
SMALL_MODEL = "--backbone resnet18 --enc_layers 1 --dec_layers 2 --num_queries 20"
SANITIZER = (
    "compute-sanitizer --report-api-errors no --target-processes all --kernel-name "
    "kns=deformable --error-exitcode 1"
)
COUNTERS = (
    "ncu --clock-control none --print-units base -k 'regex:^(forward|backward)_kernel$' -c 4"
    " --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats"
    " --metrics smsp__inst_executed.sum,lts__t_sectors_op_red.sum,l1tex__t_sector_hit_rate.pct"
)
TRITON = "import torch; from models.ops import backends; backends.choose('triton', torch.device('cuda', 0))"
PYTEST_SUMMARY = r"^(?:=+ )?(\d+.* (?:passed|failed|collected|deselected).*?)(?: =+)?$"
KERNEL_TESTS = "tests/test_ops_property.py tests/test_ops_backends.py"
GPU_TESTS = " ".join(
    f"tests/test_{name}.py"
    for name in (
        "engine",
        "ops",
        "ops_backends",
        "ops_deterministic",
        "ops_property",
        "precision",
        "activation_checkpointing",
    )
)


def milliseconds_of(variant: str) -> str:
    """The pattern of a time that benchmark.py prints."""
    return rf"^{variant}: .*\(([\d.]+) ms"


def time_of_operator(load: str, column: int) -> str:
    """The pattern of the compiled operator's time in `benchmark.py op`: forward (0), or with the
    backward (1).
    """
    return rf"^encoder \d+ x \d+, {load}\n +compiled +" + r"[\d.]+ ms +[\d.]+x +" * column + r"([\d.]+) ms"


def plain_figure(name: str) -> str:
    """The pattern of a figure of the comparison with the plain kernels, for the encoder and one
    image.
    """
    return rf"^encoder 800 x 1333, batch 1, around\n(?:  .*\n)*?  {name} +([\d.]+)"


def counter(name: str, launch: int) -> str:
    """The pattern of a counter that ncu prints, of the launch with that number."""
    return rf"(?:{name} +\S+ +[\d,.]+[\s\S]*?){{{launch}}}{name} +\S+ +([\d,.]+)"


def preparation(device: str) -> Step:
    return Step(
        "prepare",
        10,
        150,
        f"python3 -m tools.gpu_check.prepare --device {device}",
        {"device": r"^device: (.*)", "software": r"^software: (.*)", "kernels": r"^kernels: (.*)"},
    )


def timings(device: str) -> list[Step]:
    """Alone on the GPU, in the order of their worth."""
    gpu = device == "cuda"
    size = "--size 800 1333" if gpu else f"--size 64 96 {SMALL_MODEL}"
    op_size = "--size 800 1333" if gpu else "--size 64 96"
    few, more, many = (8, 5, 30) if gpu else (1, 1, 2)
    warm = 3 if gpu else 1
    train = (
        f"python3 benchmark.py train --device {device} {size} --batch_size 2 {BATCHFORMER} "
        f"--warm_iters {warm}"
    )
    return [
        Step(
            "kernels",
            30,
            60,
            f"python3 -m pytest -q -m gpu {KERNEL_TESTS} -k compiled",
            {"tests": PYTEST_SUMMARY},
            "none fails",
            needs_gpu=True,
            modules=("pytest", "hypothesis"),
        ),
        Step(
            "training step",
            40,
            60,
            f"{train} --num_iters {few} --amp bf16 --profile --trace {{logs}}/trace.json.gz",
            {
                "float32 ms": milliseconds_of("training step, --bf 1"),
                "bfloat16 ms": milliseconds_of("training step, --bf 1 --amp bf16"),
                "bfloat16 MiB": r"^training step, --bf 1 --amp bf16: .*, ([\d.]+) MiB",
                "bfloat16 at work ms": r"^Self CUDA time total: ([\d.]+)ms",
            },
            "float32 110 to 120 ms, bfloat16 45 to 55 ms, 3 to 5 of which the GPU is idle",
            modules=DETECTOR,
        ),
        Step(
            "operator",
            55,
            80,
            f"python3 benchmark.py op --device {device} {op_size} --num_iters {more}",
            {
                "forward ms": time_of_operator("batch 1, around", 0),
                "with backward ms": time_of_operator("batch 1, around", 1),
                "forward, batch 4 ms": time_of_operator("batch 4, around", 0),
                "forward from offsets ms": time_of_operator("batch 1, from offsets", 0),
                "with backward from offsets ms": time_of_operator("batch 1, from offsets", 1),
            },
            "forward 0.10 to 0.14 ms, with backward 0.6 to 1.1 ms; batch 4: forward 0.40 to 0.56 ms",
        ),
        Step(
            "training step, TF32",
            25,
            35,
            f"{train} --num_iters {more}",
            {"ms": milliseconds_of("training step, --bf 1")},
            "70 to 75 ms",
            {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
            modules=DETECTOR,
        ),
        Step(
            "inference",
            20,
            35,
            f"python3 benchmark.py --device {device} {size} --warm_iters {warm} --num_iters {many} "
            f"--amp bf16"
            " --against_reference",
            {
                "float32 ms": milliseconds_of("inference"),
                "bfloat16 ms": milliseconds_of("inference --amp bf16"),
                "in plain PyTorch ms": milliseconds_of("inference --amp bf16, the operator in plain PyTorch"),
            },
            "bfloat16 about 15 ms, of which the host needs 6 to 8 ms for launches",
            modules=DETECTOR,
        ),
        Step(
            "operator, bfloat16",
            50,
            80,
            f"python3 benchmark.py op --device {device} --type bfloat16 {op_size} --batch 1 "
            f"--num_iters {more}",
            {
                "forward ms": time_of_operator("batch 1, around", 0),
                "with backward ms": time_of_operator("batch 1, around", 1),
            },
            "forward 0.08 to 0.105 ms, 1.2 to 1.4 times as fast as float32; with backward 0.6 to 1.07 ms",
        ),
        Step(
            "plain kernels",
            15,
            30,
            "python3 -m tools.gpu_check.compare_plain",
            {
                "times as fast": plain_figure("times faster"),
                "ordered backward us": plain_figure("ordered backward"),
            },
            "at least 2 times as fast; ordered backward 2,000 to 3,000 us",
            needs_gpu=True,
        ),
        Step(
            "counters",
            30,
            45,
            f"{f'{COUNTERS} ' if gpu else ''}python3 -m tools.gpu_check.op_once --device {device}",
            {
                "forward instructions": counter("smsp__inst_executed.sum", 0),
                "backward instructions": counter("smsp__inst_executed.sum", 1),
                "backward additions, sectors": counter("lts__t_sectors_op_red.sum", 1),
                "forward first-level hits %": counter("l1tex__t_sector_hit_rate.pct", 0),
            },
            "73 and 126 million instructions of a warp; 1.29 GB of additions, 40 million sectors; hits 76 %",
        ),
    ]


def checks(device: str) -> list[Step]:
    """Side by side, after the timings."""
    gpu = device == "cuda"
    sizes = (
        "--train_sizes 256 288 --crop_resize_sizes 256 --crop_sizes 128 224 --eval_size 288 --max_size 480"
    )
    if not gpu:
        sizes = "--train_sizes 64 80 --crop_resize_sizes 64 --crop_sizes 48 64 --eval_size 80 --max_size 128"
    flags = (
        f"--device {device} --coco_path {{data}} --backbone resnet18 --backbone_weights none "
        f"--backbone_norm gn --enc_layers 2 --dec_layers 2 --num_queries 100 {BATCHFORMER} {sizes} "
        f"--batch_size 2 --num_workers 2 --log_every 4"
    )
    checkpoint = "--resume {work}/resume/whole/checkpoint.pth"
    return [
        Step(
            "data",
            10,
            60,
            f"python3 -m datasets.synthetic --output_dir {{data}} {DATA}",
            modules=("pycocotools", "scipy", "tqdm"),
        ),
        Step(
            "stop and resume",
            100,
            150,
            f"python3 -m tools.gpu_check.resume {flags} --output_dir {{work}}/resume --save_every "
            f"4 --deterministic --epochs 2",
            {"two ends": r"^(identical)"},
            "identical to the bit",
            modules=TRAINING,
            after="data",
        ),
        Step(
            "tests",
            100,
            120,
            f"python3 -m pytest -q -m gpu {GPU_TESTS} -k 'not triton'{'' if gpu else ' --collect-only'}",
            {"tests": PYTEST_SUMMARY},
            "none fails",
            modules=("pytest", "hypothesis", *TRAINING),
        ),
        Step(
            "wrong accesses",
            90,
            120,
            f"{SANITIZER} python3 -m pytest -q -m gpu tests/test_ops_property.py -k 'compiled and not large'",
            {"errors": r"ERROR SUMMARY: (\d+) error"},
            "no error",
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            needs_gpu=True,
            modules=("pytest", "hypothesis"),
        ),
        Step(
            "one process of NCCL",
            20,
            60,
            f"python3 -m tools.gpu_check.one_rank --device {device}",
            {"group": r"^one process, (.*)"},
            "the weights that training without DDP gives",
            modules=TRAINING,
        ),
        Step("triton", 15, 60, f'python3 -c "{TRITON}"', {}, "agrees with the reference", needs_gpu=True),
        Step(
            "self-test",
            20,
            60,
            "python3 models/ops/test.py",
            {"not right": r"^\* False (.*)"},
            "all lines True",
            {"MS_DEFORM_ATTN_BACKEND": "compiled"},
        ),
        Step(
            "prediction",
            25,
            60,
            f"python3 tools/predict.py {checkpoint} --output_dir {{work}}/predictions --device "
            f"{device} {{data}}/val2017",
            {"pictures": r"^pictures: (\d+)"},
            "all pictures done",
            modules=(*TRAINING, "matplotlib"),
            after="stop and resume",
        ),
        Step(
            "evaluation",
            25,
            60,
            f"python3 main.py {flags} --eval --amp bf16 {checkpoint}",
            {"AP": r"^ *AP +([\d.]+)"},
            "runs to the end",
            modules=TRAINING,
            after="stop and resume",
        ),
    ]
