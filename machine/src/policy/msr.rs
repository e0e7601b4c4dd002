//! Model-specific registers that the machine decides.
