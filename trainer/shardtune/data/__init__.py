"""From the user's data to token ids on disk.

`sources` reads rows from files (`files`), saved dataset folders and the hub (`saved`) and the documentation
of the installed Python packages (`docs`); `fields` turns rows into texts; `splits` decides which examples are
for training, validation and test; `corpus` remembers them; `tables` keeps their token ids in memory-mapped
files. `order` decides which examples make a step, `steps` lays them out; `stream` and `stream_steps` do so for
data that is not kept, and `prefetch` works ahead. Nothing here needs torch, so that wrong data is refused at
once.
"""
