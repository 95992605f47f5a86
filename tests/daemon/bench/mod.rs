//! `lbd bench`, and the comparison with other balancers.

mod command;
mod run;
