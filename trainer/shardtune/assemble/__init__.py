"""From a config to the parts of a run: the only place that knows every name. Below it there are plain arguments."""
