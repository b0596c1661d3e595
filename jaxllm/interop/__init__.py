"""Other programs' formats: readers and writers."""
