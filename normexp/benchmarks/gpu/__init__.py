"""The sections of the benchmark `gpu`: each module measures one thing and yields rows."""
