"""Convert raw text to Megatron's indexed datasets: readers, encoders, workers, writer."""
