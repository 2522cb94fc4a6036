"""The record tool, by subject.

Reading: `logs` (what a run printed), `tree` and `script` (a script's text, parsed), `wrapper`
(self-extracting scripts), `strip` (without comments), `folder` (a record folder). Checking:
`finding`, `case` (a folder under check and its track), `package` and `accounting` (P1 to P9,
AUDIT), `source` (S5 to S10), `heuristics` (S1 to S4), `static` (the ten of them), `rerun`
(processes under `watch`, R12), `rescore` (R6, R10), `checks` (all in order). Making: `preflight`
(what cannot become a record), `runs` (seeds in processes of their own), `submission` (its JSON),
`page` (README and plot). Several records: `compare` (is one better than another), `board` (a
track's leaderboard). For the codec: `arithmetic` (the coder), `spelling` (exact text as tokens).
For all that takes long: `progress`; for command lines: `arguments`.

Importing the package puts the repository root on the path, where train_gpt.py is.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
