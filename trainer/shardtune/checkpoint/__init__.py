"""Checkpoints: one format for every strategy, whole or absent.

A folder `checkpoints/step-00000500` holds

- `rank-00000-of-00002.safetensors`, what each rank had: see `shardtune.protocols.Piece`. A piece is a 1-D tensor under
  the key NAME (the value of a parameter) or NAME#WHAT; the file's metadata has, under `pieces`, JSON that gives for
  each key [start, [shape of the whole tensor]]. What belongs to a rank and not to a parameter, such as its random
  state, has the NAME rank-0, rank-1, ….
- `state.json`: step, epoch, cursor and counts; ranks and strategy; schedule and scaler; the resolved config; versions;
  what identifies the data and the base model; what the tuning method remembers.
- `config.yaml`: the resolved config once more, as a file to start from.
- `manifest.json`: the size and the SHA-256 of each of these files; `manifest.json.sha256`: its own, as `sha256sum`
  writes it.

It is written as `checkpoints/.step-00000500.partial-TOKEN` and renamed when all of it is on the disk. What is found
damaged is renamed to `step-00000500.damaged` (or .damaged-2, …) and never read again.
"""
