"""What a model knows: the text it predicts and the questions it answers, from local files."""
