"""What the model learns to do: one file a task, chosen by `task.kind`."""
