"""Step times and memory of published runs on 8xH100, and what the plan says of the same settings.

From the logs in the records folders of github.com/openai/parameter-golf. Repeated layers are
written as so many more layers. Left out: two early runs that are 25 to 45 % slower than their
neighbours for reasons that their logs do not give, and one whose log does not say when its
recurrence began.
"""

import dataclasses
import re

from conftest import ROOT
from helpers import settings_in

import train_gpt as tg

# Name | milliseconds a step | peak MiB a GPU, if the log says that | settings. After "then": what
# changes when 35 % of the time are over, and the milliseconds are the mean; "not fitted": the
# plan's constants do not know the run.
LOGS = """
03-17 baseline | 43.54 | 10184 |
03-18 LongContextSeq2048 | 51.89 | 10247 | TRAIN_SEQ_LEN=2048
03-19 10L_MixedPrecision | 45.78 | 11389 | NUM_LAYERS=10
03-19 MLP3x_QAT | 48.67 | 11188 | MLP_MULT=3
03-19 MixedQuant | 48.41 | 8517 | MLP_MULT=3 TRAIN_BATCH_TOKENS=393216 TRAIN_SEQ_LEN=4096
03-19 WarmdownQuantization | 83.35 | 16840 | LONG MLP_MULT=3
03-19 smeargate_orthoinit | 49.80 | 11340 | MLP_MULT=3 SMEAR=1 BIGRAM_VOCAB_SIZE=4096
03-20 Int6 SmearGate | 81.32 | 16965 | LONG MLP_MULT=3 SMEAR=1 BIGRAM_VOCAB_SIZE=4096
03-20 10L Int5MLP | 89.42 | 18871 | LONG NUM_LAYERS=10 MLP_MULT=3 SMEAR=1 BIGRAM_VOCAB_SIZE=10240
03-20 11L XSA4 FA3 | 85.24 | 20600 | ELEVEN XSA_LAST_N=4
03-22 11L GPTQ-lite | 84.56 | 20862 | ELEVEN XSA_LAST_N=4 VE_LAYERS=9,10
03-23 ParallelMuon | 83.59 | 21471 | ELEVEN XSA_LAST_N=4 VE_LAYERS=9,10 LEAKY_SLOPE=0.5
03-25 XSA all | 86.63 | 22858 | ELEVEN XSA_LAST_N=11 LEAKY_SLOPE=0.5
03-31 mini recurrence | 96.14 | 26999 | ELEVEN NUM_LAYERS=13 XSA_LAST_N=13
04-01 Vocab4096 MLP4x | 99.75 | 25769 | LARGE VOCAB_SIZE=4096
04-09 three-layer recurrence | 131.7 | 39045 | LARGE then NUM_LAYERS=17
04-10 VarLenAttn | 123.3 | 40019 | LARGE then NUM_LAYERS=17
PR 1855, before | 96.0 | 0 | LARGE
PR 1855, after | 140.0 | 41707 | LARGE NUM_LAYERS=17
PR 2135, before | 94.3 | 0 | LARGE
PR 2135, after | 148.0 | 41697 | LARGE NUM_LAYERS=17
PR 489 | 57.2 | 0 | CONFIG=2026-03-22_pr489
PR 740 | 87.0 | 0 | CONFIG=2026-03-25_pr740_v2
PR 834, not fitted | 101.0 | 0 | CONFIG=2026-03-26_pr834
PR 859, not fitted | 114.0 | 0 | CONFIG=2026-03-26_pr859
"""
LONG = "TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048"
SHORT_FOR = {
    "LONG": LONG,
    "ELEVEN": f"{LONG} NUM_LAYERS=11 MLP_MULT=3 SMEAR=1 BIGRAM_VOCAB_SIZE=2048",
    "LARGE": f"{LONG} NUM_LAYERS=11 MLP_MULT=4 VOCAB_SIZE=8192 XSA_LAST_N=11",
    "CONFIG=": f"CONFIG={ROOT}/records/track_10min_16mb/",
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A run's milliseconds a step, and its peak memory a GPU in MiB, 0 if unknown."""

    name: str
    ms: float
    mib: int
    settings: str

    @property
    def fitted(self) -> bool:
        return "not fitted" not in self.name

    def configs(self) -> list[tg.Config]:
        """What it trains, and what it trains later."""
        first, *later = self.settings.split(" then ")
        texts = [first, *(f"{first} {more}" for more in later)]
        return [config_of(text) for text in texts]


def config_of(text: str) -> tg.Config:
    """Settings of a line, the last word on each holds."""
    for short, long in SHORT_FOR.items():
        text = text.replace(short, long)
    for record in re.findall(r"CONFIG=\S+", text):
        text = text.replace(record, f"{record}/config.env")
    return tg.load_config({"DEFAULTS": "baseline", **settings_in(text)})


def published() -> list[Published]:
    """All lines."""
    runs = []
    for line in LOGS.strip().splitlines():
        name, ms, mib, settings = (part.strip() for part in line.split("|"))
        runs.append(Published(name, float(ms), int(mib), settings))
    return runs


PUBLISHED = published()


@dataclasses.dataclass(frozen=True)
class Planned:
    """What the plan counts for a published run."""

    run: Published
    costs: list[tg.Cost]
    memory: float  # bytes

    def ms(self) -> float:
        """Predicted milliseconds a step; the mean if the settings change on the way."""
        first, *later = (1000 * cost.seconds for cost in self.costs)
        return 1 / (0.35 / first + 0.65 / later[0]) if later else first

    def error(self) -> float:
        """Of the predicted milliseconds, relative."""
        return self.ms() / self.run.ms - 1

    def memory_error(self) -> float:
        """Of the predicted memory, relative."""
        return self.memory / 2**20 / self.run.mib - 1


def planned(run: Published) -> Planned:
    """The plan's figures for a published run."""
    counted = [tg.plan_training(cfg) for cfg in run.configs()]
    return Planned(run, [cost for _, cost in counted], tg.memory_of(*counted[-1]))
