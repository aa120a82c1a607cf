//! Functions of one element, or of one element of each operand.

mod binary;
mod unary;
