"""What a model knows, from files on this machine: text it predicts, questions it answers."""
