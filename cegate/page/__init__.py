"""One HTML page about one or more runs: what they came to, what the gate chose, how stable the choice is."""
