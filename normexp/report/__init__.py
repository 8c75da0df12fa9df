"""Tables from records: records -> rows (aggregate) -> cells (tables) -> text in four formats."""
