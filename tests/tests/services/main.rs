//! Real servers and clients: databases, SSH, the web and other protocols, the cookbook's recipes,
//! and reported problems of other projects.

mod clients;
mod clients_node;
mod clients_rust;
mod cookbook;
mod cookbook_databases;
mod cookbook_ssh;
mod mariadb;
mod openssh;
mod postgresql;
mod protocols;
mod redis;
mod reports;
mod tls;
