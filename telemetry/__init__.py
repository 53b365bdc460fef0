"""What is noted of requests: log lines, metrics and traces."""
