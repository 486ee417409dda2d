"""What was learned, in use: raw inputs made ready as in training, adapted models, calibrated probabilities."""
