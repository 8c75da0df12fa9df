"""Tables from records: records -> rows (aggregate) -> cells (tables) -> text in five formats."""
