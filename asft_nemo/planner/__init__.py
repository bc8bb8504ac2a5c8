"""Memory and seconds of a run before it is started: arithmetic on the model's sizes and the layout, nothing is allocated."""
