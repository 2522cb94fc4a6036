"""What to do about each failure, in a sentence."""

from __future__ import annotations

import re

from pod import Finished

# CUDA versions of torch 2.13's wheels, the newest first.
WHEELS = ("13.2", "13.0", "12.9", "12.6")

MEMORY = (
    "Lower MICRO_BATCH_TOKENS (training), EVAL_BATCH_TOKENS (windows) or TTT_DOCS (adapters); "
    "nvidia-smi shows who else holds memory on the GPU."
)
NCCL = (
    "The processes do not reach each other: set NCCL_DEBUG=INFO to see where, try "
    "NCCL_P2P_DISABLE=1 (then NCCL_IB_DISABLE=1, NCCL_SHM_DISABLE=1), look at nvidia-smi topo -m "
    "and at the size of /dev/shm."
)
SLOW = (
    "Look at nvidia-smi: other processes on the GPU, a power cap (Pwr:Usage/Cap), throttling "
    "(nvidia-smi -q -d PERFORMANCE); and at top for a busy host. A card with less than an H100 "
    "SXM's power is slower by that much."
)
MATH = (
    "No fused kernel takes training's attention: update torch, or install FlashAttention 3 for "
    "this torch and set ATTN=fa3."
)
ANGLES = (
    "A kernel works out rotary angles, which are to be read from a table: that costs time in every "
    "step. If TORCHINDUCTOR_CACHE_DIR also holds kernels of other programs, empty it first."
)
GRAPHS = (
    "A graph was compiled on the clock: TORCH_LOGS=recompiles names the guard that failed; "
    "this torch may differ from the tested ones, 2.11 and 2.13."
)
LOSSES = (
    "bfloat16 does not compute what float32 does: train with COMPILE=0, then with ATTN=sdpa, to "
    "see whether Inductor or the attention kernel is wrong; torch 2.11 and 2.13 are tested."
)
FITS = (
    "The stage would not end within 600 s on eight GPUs: turn it off, take a larger EVAL_STRIDE or "
    "larger chunks; the program would skip it and end with exit code 5."
)
SCORE = (
    "A score that fails a check counts for nothing: its line `audit` in the log says what was "
    "found; COMPILE=0 tells whether a kernel is to blame."
)
WARMUP = (
    "Compilation takes long before the clock starts: keep the folder of TORCHINDUCTOR_CACHE_DIR "
    "between runs, and see that the host has cores to spare."
)
WAITS = "The host waits for the GPU in the line that is named: it costs speed, no truth."
IDLE = "The GPU waits for the host: see with top whether other processes hold its cores."
TIME = "The budget of this check was used up: run the rest with --only NAMES, or all with --budget."
CODE = "The log of that name says why; the exit codes stand at the head of section 13."
RESUME = (
    "A run that is interrupted would be lost: see whether OUT_DIR is on a disk that keeps files, "
    "and whether something kills the processes without SIGTERM."
)
AGAIN = (
    "Another process scores the artifact otherwise: compiled kernels may differ by 1e-5; more "
    "means a wrong kernel or a damaged file (COMPILE=0 decides)."
)
BUG = "This is a fault of the check or of the program: the file named error has the traceback."

# The first pattern that a log shows decides.
DIAGNOSES = {
    r"driver version is insufficient|driver on your system is too old|torch cannot use": "",
    r"no kernel image is available|is not compatible with the current PyTorch": (
        "This torch has no kernels for this GPU: install a newer wheel of torch."
    ),
    r"out of memory": MEMORY,
    r"[Ff]ailed to find C compiler|Python\.h|gcc.*not found|cannot find -lcuda": (
        "Inductor and Triton build their launchers with a C compiler: apt-get install -y "
        "build-essential python3-dev; COMPILE=0 runs without, slowly."
    ),
    r"recompile_limit|FailOnRecompileLimitHit": GRAPHS,
    r"ncclSystemError|ncclUnhandled|NCCL error|ProcessGroupNCCL|[Ww]atchdog": NCCL,
    r"EADDRINUSE|[Aa]ddress already in use": (
        "A port is taken: another run is on this machine; end it or wait for its end."
    ),
    r"No space left on device|cannot be written": (
        "The disk is full: df -h; --out and TORCHINDUCTOR_CACHE_DIR can be elsewhere."
    ),
    r"No module named '(?!flash_attn_interface)": (
        "A package is missing: pip install -r requirements.txt (on an image with its own torch: "
        "pip install numpy sentencepiece zstandard)."
    ),
    r"problems?; nothing was started": "A setting was refused, in words, in the log of that name.",
}


def wheel_index(driver_cuda: str) -> str:
    """The name of the index of torch's wheels that a driver of this CUDA version can use."""
    numbers = re.findall(r"\d+", driver_cuda)
    driver = (int(numbers[0]), int(numbers[1])) if len(numbers) > 1 else (12, 6)
    for version in WHEELS:
        major, minor = map(int, version.split("."))
        if (major, minor) <= driver:
            return f"cu{major}{minor}"
    return "cu126"  # any driver of CUDA 12 takes it


def for_driver(torch_cuda: str | None, driver_cuda: str) -> str:
    """What to do if torch does not get at the GPUs."""
    if torch_cuda is None:
        said = "This torch is built for CPUs"
    else:
        said = f"torch is built for CUDA {torch_cuda}, the driver is of CUDA {driver_cuda or '?'}"
    wheel = f"install the torch wheel of PyTorch's index {wheel_index(driver_cuda)}"
    return f"{said}: {wheel} (its site prints the command), or rent a pod with a newer driver."


def diagnose(finished: Finished, driver: str = "") -> str:
    """What to do about a job that ended otherwise than it should."""
    if finished.exit_code == "no time":
        return TIME
    for pattern, sentence in DIAGNOSES.items():
        if re.search(pattern, finished.text[-50_000:]):
            return sentence or driver
    if finished.exit_code == "timeout":
        several = "It did not end in time; its log has where its threads stood. "
        return several + NCCL
    return CODE
