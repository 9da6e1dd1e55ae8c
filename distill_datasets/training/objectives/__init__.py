"""What a step learns: responses, the teacher's probabilities, or its corrections."""
