//! Both services and a client, over Unix sockets: everything but the command line.

mod browser;
mod dashboard;
mod driver;
mod failures;
mod http;
mod limits;
mod memory;
mod metrics;
mod page;
mod proxy;
mod ranges;
mod refusals;
mod restart;
mod run;
mod scenarios;
mod stack;
mod surface;
mod table;
mod tables;
mod watch;
