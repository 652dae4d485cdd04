//! Both services and a client, over Unix sockets: everything but the command line.

mod failures;
mod limits;
mod memory;
mod proxy;
mod ranges;
mod refusals;
mod stack;
mod surface;
mod table;
mod tables;
mod watch;
