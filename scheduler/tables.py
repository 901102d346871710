"""Columns of the integer tables that the planner's compiled loops share."""

# Nodes: parent, keys, extents from, to, room to grow.
PARENT, LENGTH, FIRST_EXTENT, STOP_EXTENT, ROOM = range(5)

# Extents: first slot, keys, position of the first key.
E_SLOT, E_KEYS, E_POSITION = range(3)

# Walk: the parent's place (-1 at the root), depth, places and rows at or below the node, its own rows, the first of all
# these rows, and the number of nodes that the place stands for.
W_PARENT, W_DEPTH, W_SIZE, W_ROWS, W_OWN_ROWS, W_FIRST_ROW, W_MERGED = range(7)

# Units: rows from, to; the lowest pending node and the number of pending nodes; the unit's own nodes from, to; rank,
# ascending on every row's path; keys, and those of them charged as mixed.
U_FIRST_ROW, U_STOP_ROW, U_LOWEST, U_PENDING, U_FIRST_NODE, U_STOP_NODE, U_RANK, U_KEYS, U_MIXED = range(9)

# Pieces of units: rows from, to, segments from, to, rank, piece, keys, mixed keys.
P_FIRST_ROW, P_STOP_ROW, P_FIRST_SEGMENT, P_STOP_SEGMENT, P_RANK, P_PIECE, P_KEYS, P_MIXED = range(8)

# Segments: first slot, keys, first position, rows that see it from, to, whether it grows, room.
S_SLOT, S_KEYS, S_POSITION, S_FIRST_ROW, S_STOP_ROW, S_GROWS, S_ROOM = range(7)
