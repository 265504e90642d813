"""What train.py needs and a reader of the method may skip."""
