"""Which parameters are trained: one file a method, chosen by `tuning.method`."""
