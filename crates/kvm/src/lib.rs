//! KVM's object model and exit path in user space.

mod error;
pub mod eventfd;
pub mod irqchip;
pub mod mailbox;
pub mod time;
pub mod timers;

pub use error::{Error, Result};
