//! Alignment: the losses against TRL's, and the trainers.

mod align {
    mod losses;
    mod trainers;
}
