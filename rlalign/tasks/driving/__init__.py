"""ToyDrive: a driving world that fits on a laptop, for planners that think in tokens."""
