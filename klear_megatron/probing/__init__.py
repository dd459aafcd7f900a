"""What a model makes of a long context: loss by position, and whether it finds a needle."""
