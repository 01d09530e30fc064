"""Examples and conversations to train on and to evaluate with."""
