//! The leaf functions, one file each, checks in the order of the specification: the first check
//! that fails decides the answer.
//!
//! Source: TDX module source, tdh_*.c. Each function takes its operands from the registers, sets
//! the registers that the leaf defines as outputs, and changes nothing before its last check.

mod mng_addcx;
mod mng_create;
mod mng_init;
mod mng_key_config;
mod mng_key_freeid;
mod mng_key_reclaimid;
mod mng_rd;
mod mng_vpflushdone;
mod mng_wr;

mod vp_addcx;
mod vp_create;
mod vp_enter;
mod vp_flush;
mod vp_init;
mod vp_rd;
mod vp_wr;

mod mem_sept_add;
mod mem_sept_rd;
mod mem_sept_remove;

mod mem_page_add;
mod mem_page_aug;
mod mem_page_demote;
mod mem_page_promote;
mod mem_page_relocate;
mod mem_page_remove;
mod mem_range_block;
mod mem_range_unblock;
mod mem_rd;
mod mem_track;
mod mem_wr;

mod mr_extend;
mod mr_finalize;

mod phymem_cache_wb;
mod phymem_page_rdmd;
mod phymem_page_reclaim;
mod phymem_page_wbinvd;

mod sys;
mod sys_info;
mod sys_rd;
mod sys_rdall;

pub(crate) use mem_page_add::mem_page_add;
pub(crate) use mem_page_aug::mem_page_aug;
pub(crate) use mem_page_demote::mem_page_demote;
pub(crate) use mem_page_promote::mem_page_promote;
pub(crate) use mem_page_relocate::mem_page_relocate;
pub(crate) use mem_page_remove::mem_page_remove;
pub(crate) use mem_range_block::mem_range_block;
pub(crate) use mem_range_unblock::mem_range_unblock;
pub(crate) use mem_rd::mem_rd;
pub(crate) use mem_sept_add::mem_sept_add;
pub(crate) use mem_sept_rd::mem_sept_rd;
pub(crate) use mem_sept_remove::mem_sept_remove;
pub(crate) use mem_track::mem_track;
pub(crate) use mem_wr::mem_wr;
pub(crate) use mng_addcx::mng_addcx;
pub(crate) use mng_create::mng_create;
pub(crate) use mng_init::mng_init;
pub(crate) use mng_key_config::mng_key_config;
pub(crate) use mng_key_freeid::mng_key_freeid;
pub(crate) use mng_key_reclaimid::mng_key_reclaimid;
pub(crate) use mng_rd::mng_rd;
pub(crate) use mng_vpflushdone::mng_vpflushdone;
pub(crate) use mng_wr::mng_wr;
pub(crate) use mr_extend::mr_extend;
pub(crate) use mr_finalize::mr_finalize;
pub(crate) use phymem_cache_wb::{CacheWriteBack, phymem_cache_wb};
pub(crate) use phymem_page_rdmd::phymem_page_rdmd;
pub(crate) use phymem_page_reclaim::phymem_page_reclaim;
pub(crate) use phymem_page_wbinvd::phymem_page_wbinvd;
pub(crate) use sys::{
    sys_config, sys_init, sys_key_config, sys_lp_init, sys_lp_shutdown, sys_tdmr_init,
};
pub(crate) use sys_info::sys_info;
pub(crate) use sys_rd::sys_rd;
pub(crate) use sys_rdall::sys_rdall;
pub(crate) use vp_addcx::vp_addcx;
pub(crate) use vp_create::vp_create;
pub(crate) use vp_enter::{enter, vp_enter};
pub(crate) use vp_flush::vp_flush;
pub(crate) use vp_init::vp_init;
pub(crate) use vp_rd::vp_rd;
pub(crate) use vp_wr::vp_wr;
