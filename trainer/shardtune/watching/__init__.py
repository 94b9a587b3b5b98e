"""A run's figures as they come, from its folder alone: on this machine or another that shares the file system."""
