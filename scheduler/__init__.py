"""What runs in a step, and how: `batch` chooses the spans, `planner` turns them into units of attention."""
