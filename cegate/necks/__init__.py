"""What turns the features of a backbone into those of a head."""
