"""The Triton backend of both ops: three launch shapes over packed rank rows; see the README in this folder."""
