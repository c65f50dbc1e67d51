"""The steps of the check: one table of timings and one of checks.

docs/gpu.md says what each step shows, and which values are expected on an H100. Without a GPU the
same commands run at small sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

# seconds that all checks together usually take
CHECKS_TAKE = 150


@dataclass(frozen=True)
class CheckStep:
    """A command with time limits.

    usual: seconds that it takes; it is left out if fewer are left. limit: seconds after which it is
    ended.
    command: {data}, {work} and {logs} are folders; the other fields are those of SIZES.
    shows: pattern of the lines of its output that the summary shows.
    modules: Python modules that it needs. after: the step whose files it reads.
    """

    name: str
    usual: int
    limit: int
    command: str
    shows: str = ""
    modules: str = ""
    after: str = ""
    needs_gpu: bool = False


SMALL_MODEL = "--backbone resnet18 --enc_layers 1 --dec_layers 2 --num_queries 20"
NCU = (
    "ncu --clock-control none --print-units base -k 'regex:(forward|backward)_kernel$' -c 4"
    " --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats"
    " --metrics smsp__inst_executed.sum,lts__t_sectors_op_red.sum,l1tex__t_sector_hit_rate.pct"
)
# The cpu sizes only show that the commands work.
SIZES = {
    "cuda": {
        "model": "--size 800 1333",
        "operator": "--size 800 1333",
        "iterations": "--warm_iters 3 --num_iters 8",
        "many": "--warm_iters 3 --num_iters 30",
        "repeats": "--num_iters 5",
        "images": "--train_sizes 256 288 --crop_resize_sizes 256 --crop_sizes 128 224"
        " --eval_size 288 --max_size 480",
        "ncu": NCU,
        "pytest": "",
    },
    "cpu": {
        "model": f"--size 64 96 {SMALL_MODEL}",
        "operator": "--size 64 96",
        "iterations": "--warm_iters 1 --num_iters 1",
        "many": "--warm_iters 1 --num_iters 2",
        "repeats": "--num_iters 1",
        "images": "--train_sizes 64 80 --crop_resize_sizes 64 --crop_sizes 48 64"
        " --eval_size 80 --max_size 128",
        "ncu": "",
        "pytest": "--collect-only",
    },
}

BATCHFORMER = "--bf 1 --share_bf 0 --insert_idx 0"
TRAIN_STEP = "python3 benchmark.py train --device {device} {model} --batch_size 2 {iterations} " + BATCHFORMER
MAIN_FLAGS = (
    "--device {device} --coco_path {data} --backbone resnet18 --backbone_weights none --backbone_norm gn"
    " --enc_layers 2 --dec_layers 2 --num_queries 100 {images} --batch_size 2 --num_workers 2"
    " --log_every 4 " + BATCHFORMER
)
GPU_TESTS = (
    "tests/test_engine.py tests/test_ops.py tests/test_ops_backends.py tests/test_ops_deterministic.py"
    " tests/test_ops_property.py tests/test_precision.py tests/test_activation_checkpointing.py"
)
SANITIZER = (
    "compute-sanitizer --report-api-errors no --target-processes all --kernel-name kns=deformable"
    " --error-exitcode 1"
)
TRITON = "import torch; from models.ops import backends; backends.choose('triton', torch.device('cuda', 0))"

# what is imported, for `modules`
DETECTOR = "scipy tqdm"
TRAINING = f"{DETECTOR} pycocotools safetensors"
TESTING = "pytest hypothesis"

# lines with times or results, for `shows`
BENCHMARK_LINES = r"training step|inference|Self CUDA time total"
OPERATOR_LINES = r"encoder|decoder| +compiled "
PYTEST_LINES = r"(=+ )?\d+.* (passed|failed|collected|deselected)"

PREPARE = CheckStep(
    "prepare",
    10,
    150,
    "python3 -m tests.gpu_check.prepare --device {device}",
    "device:|software:|kernels:",
)

# They run alone on the GPU, the most useful ones first.
TIMINGS = (
    # wrong kernels would make all times of them useless
    CheckStep(
        "kernels",
        30,
        60,
        "python3 -m pytest -q -m gpu tests/test_ops_property.py tests/test_ops_backends.py -k compiled",
        PYTEST_LINES,
        TESTING,
        needs_gpu=True,
    ),
    # float32 and bfloat16, with a profile: how long the GPU waits for the host
    CheckStep(
        "training step",
        40,
        60,
        TRAIN_STEP + " --amp bf16 --profile --trace {logs}/trace.json.gz",
        BENCHMARK_LINES,
        DETECTOR,
    ),
    # all backends side by side
    CheckStep(
        "operator", 55, 80, "python3 benchmark.py op --device {device} {operator} {repeats}", OPERATOR_LINES
    ),
    # what float32 would take with tensor cores
    CheckStep(
        "training step, TF32",
        25,
        35,
        TRAIN_STEP + " --float32_matmul high",
        BENCHMARK_LINES,
        DETECTOR,
    ),
    # the whole network with and without the compiled operator
    CheckStep(
        "inference",
        20,
        35,
        "python3 benchmark.py --device {device} {model} {many} --amp bf16 --against_reference",
        BENCHMARK_LINES,
        DETECTOR,
    ),
    # what the host has to do in a step
    CheckStep(
        "launches",
        15,
        40,
        "python3 benchmark.py launches --device {device} {model} --batch_size 2 " + BATCHFORMER,
        "sum|kept for the backward",
        DETECTOR,
    ),
    # half the bytes: is it faster?
    CheckStep(
        "operator, bfloat16",
        50,
        80,
        "python3 benchmark.py op --device {device} --type bfloat16 {operator} --batch 1 {repeats}",
        OPERATOR_LINES,
    ),
    # kernels without optimisation, as a measure of ours
    CheckStep(
        "plain kernels",
        15,
        30,
        "python3 -m tests.gpu_check.compare_plain",
        "encoder|decoder| +(times faster|ordered)",
        needs_gpu=True,
    ),
    # why the operator takes the time that it takes
    CheckStep(
        "counters",
        30,
        45,
        "{ncu} python3 -m tests.gpu_check.op_once --device {device}",
        r" +(forward_kernel|backward_kernel|smsp__inst|lts__t_sectors_op_red|l1tex__t_sector_hit)",
    ),
    # last: it compiles for a minute or more
    CheckStep(
        "training step, compiled",
        100,
        180,
        TRAIN_STEP + " --amp bf16 --compile",
        BENCHMARK_LINES,
        f"{DETECTOR} triton",
        needs_gpu=True,
    ),
)

# They run side by side, after the timings.
CHECKS = (
    # the other steps train, predict and evaluate on it
    CheckStep(
        "data",
        10,
        60,
        # enough images to stop in the middle of an epoch
        "python3 -m datasets.synthetic --output_dir {data} --train_images 16 --val_images 8",
        modules=TRAINING,
    ),
    # bit-identical weights after a resume in the middle of an epoch
    CheckStep(
        "stop and resume",
        100,
        150,
        f"python3 -m tests.gpu_check.resume {MAIN_FLAGS}"
        " --output_dir {work}/resume --save_every 4 --deterministic --epochs 2",
        "identical",
        TRAINING,
        after="data",
    ),
    # Triton's tests compile for minutes
    CheckStep(
        "tests",
        100,
        120,
        f"python3 -m pytest -q -m gpu {GPU_TESTS} -k 'not triton' {{pytest}}",
        PYTEST_LINES,
        f"{TESTING} {TRAINING}",
    ),
    # without a cache each array is an allocation, so that a wrong access is seen
    CheckStep(
        "wrong accesses",
        90,
        120,
        f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {SANITIZER}"
        " python3 -m pytest -q -m gpu tests/test_ops_property.py -k 'compiled and not large'",
        ".*ERROR SUMMARY",
        TESTING,
        needs_gpu=True,
    ),
    # DDP, which main.py does not use for one process
    CheckStep(
        "one process of NCCL",
        20,
        60,
        "python3 -m tests.gpu_check.one_rank --device {device}",
        "one process|True|False",
        TRAINING,
    ),
    # compiles the kernels and compares them with the reference
    CheckStep("triton", 15, 60, f'python3 -c "{TRITON}"', needs_gpu=True),
    # as a user runs it after a build
    CheckStep(
        "self-test", 20, 60, "env MS_DEFORM_ATTN_BACKEND=compiled python3 models/ops/test.py", r"\* False"
    ),
    # two commands on the weights of the run above
    CheckStep(
        "prediction",
        25,
        60,
        "python3 tools/predict.py --resume {work}/resume/whole/checkpoint.pth"
        " --output_dir {work}/predictions --device {device} {data}/val2017",
        "pictures:",
        f"{TRAINING} matplotlib",
        after="stop and resume",
    ),
    CheckStep(
        "evaluation",
        25,
        60,
        f"python3 main.py {MAIN_FLAGS} --eval --amp bf16 --resume {{work}}/resume/whole/checkpoint.pth",
        " *AP ",
        TRAINING,
        after="stop and resume",
    ),
)
