"""Students, teachers, and the student's export."""
