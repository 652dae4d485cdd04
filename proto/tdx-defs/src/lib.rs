//! The vocabulary that both processes share.
//!
//! Nothing here has behaviour of its own: newtypes that carry a unit, numbers with names, and
//! the codecs of registers and table entries. `tdp-mmu` (the host) and `tdx-module` (the module)
//! depend on this crate and not on each other.

mod addr;
mod fields;
mod guest;
mod layout;
mod leaf;
mod level;
mod operand;
mod page_type;
mod seamcall;
mod sept;
mod status;
mod td_params;

pub use addr::{ALL_ONES_HPA, AddrError, Gfn, Gpa, Hpa, PAGE_SHIFT, PAGE_SIZE, Pfn};
pub use fields::field;
pub use guest::{Gpr, Gprs, GuestLeaf};
pub use layout::{GpaLayout, Gpaw, Visibility};
pub use leaf::Leaf;
pub use level::{Level, LevelError, TdxLevel};
pub use operand::OperandId;
pub use page_type::PageType;
pub use seamcall::{Repeat, Seamcall, SeamcallResult};
pub use sept::{LevelState, PublicState, SeptView};
pub use status::{CompletionStatus, Details, HostReaction, Recoverability, StatusClass};
pub use td_params::{CpuidValue, TD_PARAMS_SIZE, TdAttributes, TdParams, TdParamsError};
