"""What a kept unit costs, in MACs, parameters or milliseconds."""
