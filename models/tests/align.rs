//! Alignment: the losses against TRL's.

mod align {
    mod losses;
}
