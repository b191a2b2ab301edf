"""Takes the stream of normalization statistics, stores it, answers queries and gives verdicts. No torch."""
