"""From the rows of files to what each row means."""
