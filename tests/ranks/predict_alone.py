"""Predictions of saved models by transformers alone: `predict_alone.py ROWS TASK FOLDER [TASK FOLDER ...]`.

Writes a JSON list of what each model makes of each row; our package cannot be imported here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["shardtune"] = None  # type: ignore[assignment]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plain  # noqa: E402

rows, written = plain.read_rows(Path(sys.argv[1])), []
for task, folder in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    model, info = plain.AUTO[task].from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = plain.load_tokenizer(Path(folder))
    written.append([plain.predict(model, tokenizer, task, row) for row in rows])
sys.stdout.write("\n" + json.dumps(written) + "\n")
