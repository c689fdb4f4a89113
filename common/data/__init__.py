"""What the data sets of both tasks share."""
