"""What a run would cost, estimated from a pilot. Knows no Hub."""
