//! Layers, the named cells that hold their weights, and the scope that both are made from.
//!
//! A layer is built from a [`Params`] scope, which gives its weights their names (PyTorch's) and their first values, from
//! an initialiser or from a checkpoint. Weights live in [`Param`]s and running statistics in [`Buffer`]s: shared cells that
//! are read at every forward pass, so an optimiser's step is seen by every holder.

mod init;
mod load;
mod module;
mod param;
mod params;

pub use init::Init;
pub use load::{LoadMode, LoadReport, Mismatch, StateDict};
pub use module::Module;
pub use param::{Buffer, Param};
pub use params::{Mode, Params, ParamsOptions};
