//! Kiln's models: layers, optimisers, data and the model families.

pub mod data;
pub mod nn;
pub mod optim;
pub mod report;
