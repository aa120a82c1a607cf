//! NEON: four lanes.
