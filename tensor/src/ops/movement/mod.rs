//! Operations that move elements, or only relabel them.

mod view;
